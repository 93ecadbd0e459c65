//! How the tables come to be, for SQLite and PostgreSQL alike.

use sea_orm_migration::prelude::*;

/// All migrations of the gateway's database, those of inbox and outbox included.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            infera_bus::inbox::migration(),
            infera_bus::outbox::migration(),
            Box::new(Create),
            Box::new(Fingerprints),
            Box::new(Keys),
        ]
    }
}

struct Create;

impl MigrationName for Create {
    fn name(&self) -> &str {
        "gateway_0001_requests"
    }
}

#[derive(DeriveIden)]
enum Requests {
    Table,
    Id,
    Account,
    IdempotencyKey,
    BodyHash,
    Model,
    PromptTokens,
    MaxTokens,
    Stop,
    SubmittedMs,
    DeadlineMs,
    State,
    Code,
    Message,
    Tokens,
    Finish,
    Nodes,
    SimilarityMillionths,
    Others,
    ClosedMs,
}

#[derive(DeriveIden)]
enum RevokedKeys {
    Table,
    Jti,
    RevokedMs,
}

#[async_trait::async_trait]
impl MigrationTrait for Create {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let requests = Table::create()
            .table(Requests::Table)
            .if_not_exists()
            .col(ColumnDef::new(Requests::Id).uuid().not_null().primary_key())
            .col(ColumnDef::new(Requests::Account).string().not_null())
            .col(ColumnDef::new(Requests::IdempotencyKey).string().null())
            .col(ColumnDef::new(Requests::BodyHash).binary().not_null())
            .col(ColumnDef::new(Requests::Model).string().not_null())
            .col(ColumnDef::new(Requests::PromptTokens).big_integer().not_null())
            .col(ColumnDef::new(Requests::MaxTokens).big_integer().not_null())
            .col(ColumnDef::new(Requests::Stop).text().not_null())
            .col(ColumnDef::new(Requests::SubmittedMs).big_integer().not_null())
            .col(ColumnDef::new(Requests::DeadlineMs).big_integer().not_null())
            .col(ColumnDef::new(Requests::State).string().not_null())
            .col(ColumnDef::new(Requests::Code).string().null())
            .col(ColumnDef::new(Requests::Message).text().null())
            .col(ColumnDef::new(Requests::Tokens).binary().null())
            .col(ColumnDef::new(Requests::Finish).string().null())
            .col(ColumnDef::new(Requests::Nodes).binary().null())
            .col(ColumnDef::new(Requests::SimilarityMillionths).big_integer().null())
            .col(ColumnDef::new(Requests::Others).text().null())
            .col(ColumnDef::new(Requests::ClosedMs).big_integer().null())
            .to_owned();
        manager.create_table(requests).await?;
        // Rows without a key are distinct: both databases take NULLs for unequal.
        let key = Index::create()
            .name("requests_key")
            .table(Requests::Table)
            .col(Requests::Account)
            .col(Requests::IdempotencyKey)
            .unique()
            .if_not_exists()
            .to_owned();
        manager.create_index(key).await?;
        let age = Index::create()
            .name("requests_deadline")
            .table(Requests::Table)
            .col(Requests::DeadlineMs)
            .if_not_exists()
            .to_owned();
        manager.create_index(age).await?;
        let revoked = Table::create()
            .table(RevokedKeys::Table)
            .if_not_exists()
            .col(ColumnDef::new(RevokedKeys::Jti).string().not_null().primary_key())
            .col(ColumnDef::new(RevokedKeys::RevokedMs).big_integer().not_null())
            .to_owned();
        manager.create_table(revoked).await
    }
}

/// What log-probabilities are told from, for the requests that ask for them.
struct Fingerprints;

impl MigrationName for Fingerprints {
    fn name(&self) -> &str {
        "gateway_0002_fingerprints"
    }
}

#[derive(DeriveIden)]
enum Added {
    Logprobs,
    Fingerprints,
}

#[async_trait::async_trait]
impl MigrationTrait for Fingerprints {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // SQLite adds one column a statement.
        for column in [
            ColumnDef::new(Added::Logprobs).boolean().not_null().default(false).to_owned(),
            ColumnDef::new(Added::Fingerprints).binary().null().to_owned(),
        ] {
            let add = Table::alter().table(Requests::Table).add_column(column).to_owned();
            manager.alter_table(add).await?;
        }
        Ok(())
    }
}

/// The keys that accounts make for themselves.
struct Keys;

impl MigrationName for Keys {
    fn name(&self) -> &str {
        "gateway_0003_keys"
    }
}

#[derive(DeriveIden)]
enum ApiKeys {
    Table,
    Jti,
    Account,
    Name,
    Scopes,
    Session,
    CreatedMs,
    ExpiresMs,
}

#[derive(DeriveIden)]
enum KeyOwners {
    Table,
    Account,
    TouchedMs,
}

#[async_trait::async_trait]
impl MigrationTrait for Keys {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let keys = Table::create()
            .table(ApiKeys::Table)
            .if_not_exists()
            .col(ColumnDef::new(ApiKeys::Jti).string().not_null().primary_key())
            .col(ColumnDef::new(ApiKeys::Account).string().not_null())
            .col(ColumnDef::new(ApiKeys::Name).string().not_null())
            .col(ColumnDef::new(ApiKeys::Scopes).string().not_null())
            .col(ColumnDef::new(ApiKeys::Session).boolean().not_null())
            .col(ColumnDef::new(ApiKeys::CreatedMs).big_integer().not_null())
            .col(ColumnDef::new(ApiKeys::ExpiresMs).big_integer().not_null())
            .to_owned();
        manager.create_table(keys).await?;
        for (name, column) in
            [("api_keys_account", ApiKeys::Account), ("api_keys_expires", ApiKeys::ExpiresMs)]
        {
            let index =
                Index::create().name(name).table(ApiKeys::Table).col(column).if_not_exists().to_owned();
            manager.create_index(index).await?;
        }
        let owners = Table::create()
            .table(KeyOwners::Table)
            .if_not_exists()
            .col(ColumnDef::new(KeyOwners::Account).string().not_null().primary_key())
            .col(ColumnDef::new(KeyOwners::TouchedMs).big_integer().not_null())
            .to_owned();
        manager.create_table(owners).await
    }
}
